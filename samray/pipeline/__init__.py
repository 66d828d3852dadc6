"""The part that imports ray: plan, fetch, label, write, and what a run tells about itself."""
