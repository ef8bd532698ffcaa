"""What the frozen weight is: a kind and the tensors that hold it. One file per kind."""
