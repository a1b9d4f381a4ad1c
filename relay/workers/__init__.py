"""Workers: the rules of their states, and the job that applies deadlines."""
