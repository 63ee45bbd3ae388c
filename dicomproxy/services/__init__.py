"""Edge: the services of which we are SCP, and who may use them."""
