"""The typed schema of everything a user can set, with units, defaults and whether it is part of the identity."""
