"""Style transfer: networks and losses, photographs, stylizing of any size."""
