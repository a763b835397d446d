"""x: mLSTM, the matrix memory of xLSTM."""
