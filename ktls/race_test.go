//go:build race

package ktls

const raceEnabled = true
