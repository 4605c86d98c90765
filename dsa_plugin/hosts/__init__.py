"""One adapter a host; none imports another."""
