"""The product's own dialect: what API.md promises."""
