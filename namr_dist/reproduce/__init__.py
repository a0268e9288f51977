"""`namr reproduce`: a grid of networks, and what multi-cluster ranking and the structure embedding
add to each loss."""
