"""Sources, tokenizers, corpora, packings, and the order in which training reads them."""
