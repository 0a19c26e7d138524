"""Tasks for fairseq, and the data sets and iterators that they use."""
