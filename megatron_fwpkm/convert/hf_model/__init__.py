"""Files that exported models carry: transformers runs them without this library."""
