"""The keys of a run configuration, their types and ranges, and the constraints between them.

model, data, optim, parallel and run (the other sections, and ``RunConfig``) define the keys; reads says under which
values of other keys a key is read, sampling which samplers an objective has. section, values, lengths and registered
are the types of which sections are made; json_schema writes the schema for editors and the reference for readers.
"""
