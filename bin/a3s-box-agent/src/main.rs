//! See the library.

fn main() -> std::process::ExitCode {
    a3s_box_agent::main()
}
