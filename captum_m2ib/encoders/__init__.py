"""What is known of models: any two towers as one function, their families, loading, and preparing their inputs."""
