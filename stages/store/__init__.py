"""`kd store ...`: looking at a store, checking it, keeping it sound. One command per file, imported when asked for."""
