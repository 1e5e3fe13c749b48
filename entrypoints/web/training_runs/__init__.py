"""What the training page shows: runs below a folder, read from the files that `glm train` writes."""
