"""The coordinate check: do activations and updates stay the same size when the width grows?"""
