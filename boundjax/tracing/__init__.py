"""From a JAX function to a graph: jaxprs interpreted, control flow resolved, forms recognised."""
