"""One folder an operation: reference.py is slow and plain, torch_backend.py fast and right everywhere."""
