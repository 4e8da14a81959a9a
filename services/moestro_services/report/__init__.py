"""The report: one self-contained HTML page about a lifecycle run.

`story` gathers what the records say, `plots` draws it, `lineage` draws what was made from what, `markup` has the
small pieces of HTML, `page` puts the sections together. `style.css` is put into the page.
"""

from moestro_services.report.page import page, write_report

__all__ = ["page", "write_report"]
