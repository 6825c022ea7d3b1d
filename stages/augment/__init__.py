"""`kd augment`: views of a corpus, made before the teacher sees it."""
