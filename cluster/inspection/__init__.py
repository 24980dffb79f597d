"""An episode as a person can look at it: the record in the run's folder, and what is shown of it."""
