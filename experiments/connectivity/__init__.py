"""Mode connectivity: curves between two trained networks along which a certified loss is low."""
