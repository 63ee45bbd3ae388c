"""Edge: the archives we ask, and how each of them wants to be asked."""
