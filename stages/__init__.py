"""What kd does: one stage per file or folder."""
