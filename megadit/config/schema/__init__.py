"""The keys of a run configuration, what they may say, and what must agree between them.

model, data, optim, layout (``parallel.*``) and run (the other sections, and ``RunConfig``) hold the keys; reads says
which keys another one makes idle, sampling which samplers suit an objective. Sections are made of what section, values
and lengths hold; json_schema tells all of it to editors and readers.
"""
