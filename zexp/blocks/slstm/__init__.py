"""s: sLSTM, the scalar memory of xLSTM."""
