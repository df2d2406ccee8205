"""The pictures of a report: from results to plotly figures, one module per section."""
