from wdmoe.former_paths import keep_former_paths

keep_former_paths()
