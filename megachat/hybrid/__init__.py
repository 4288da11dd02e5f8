"""One set of weights that trains under one parallel layout and generates under another."""
