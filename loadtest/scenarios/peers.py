ABOUT = "todo"
