#[allow(dead_code, unused_imports)]
mod netns;

fn main() {}
