"""The command line, run configurations, Ray topology and supervision."""
