from evaluation.evaluate import main


main()
