"""From a profile's numbers to schedules: forecast errors, the best schedule for a budget, and what may be promised."""
