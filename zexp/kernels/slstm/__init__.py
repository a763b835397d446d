"""The scalar memory of sLSTM."""
