"""What is applied from outside, and in place, to a finished model: each transform is one function."""
