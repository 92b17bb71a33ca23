"""Write report/index.html and report.json.

    python -m jobs.report runs/isic
"""

from skinsynth.stages import main

if __name__ == "__main__":
    main("report")
