"""A mixture's experts, as transformers has them: what their modules have in common, and adapters that are attached to them."""
