"""Methods x seeds x conditions from one pretrained pair, and the tables and figures of what came out."""
