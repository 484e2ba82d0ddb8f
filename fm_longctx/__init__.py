"""Long-context attention under any interval mask, on one GPU or many."""
