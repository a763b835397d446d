"""The matrix memory of mLSTM."""
