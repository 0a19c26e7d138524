"""What a training of a MoE model takes on many GPUs: parameters, memory, bytes and time, on paper. Needs no torch."""
