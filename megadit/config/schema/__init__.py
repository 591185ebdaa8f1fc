"""The keys of a run configuration: one pydantic section per file."""
