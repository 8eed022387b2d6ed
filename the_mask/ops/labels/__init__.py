"""Labels of an enlarged score map: operator and paths."""
