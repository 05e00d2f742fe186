"""Time to the first token over a real network path: two hosts, a link of any rate, nginx, real clients."""
