"""k: the time mix of RWKV-7; its channel mix is `d` with a token shift."""
