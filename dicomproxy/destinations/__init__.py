"""Edge: where instances are delivered."""
