"""One pair's explanation: the data, the function that makes it, its files and its figures."""
