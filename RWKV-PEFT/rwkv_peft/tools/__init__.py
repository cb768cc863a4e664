"""Programs above all others: the page, comparisons, plans, studies, doctor, pictures."""
