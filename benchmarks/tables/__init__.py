"""What is shown of a result: on the terminal, in documents, as plots."""
