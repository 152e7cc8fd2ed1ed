"""Independent references that tests judge the project by; they share no code with it."""
